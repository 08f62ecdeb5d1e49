// What both pages share: where the model and the runtime's files are.
//
// ?model=NAME   a folder below models/ (default: edge)
// ?device=wasm  or webgpu (default: wasm)
// ?tokens=N     the longest answer (default: 64)

import { env } from '@huggingface/transformers';

const options = new URLSearchParams(location.search);
export const model = options.get('model') ?? 'edge';
export const tokens = Number(options.get('tokens') ?? 64);
export const device = options.get('device') ?? 'wasm';

env.allowRemoteModels = false;
env.allowLocalModels = true;
// A path: files of a complete address are taken for remote ones.
env.localModelPath = new URL('models/', location.href).pathname;
env.backends.onnx.wasm.wasmPaths = new URL('node_modules/onnxruntime-web/dist/', location.href).href;

export const element = (id) => document.getElementById(id);

export function say(text) {
  element('status').textContent = text;
}

export async function reported(work) {
  try {
    return await work();
  } catch (error) {
    say(`Failed: ${error.message ?? error}`);
    document.body.dataset.state = 'failed';
    throw error;
  }
}
