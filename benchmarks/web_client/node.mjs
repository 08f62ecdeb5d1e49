// node.mjs PLAN: measure in Node.js, and print the result as JSON.

import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join, resolve } from 'node:path';
import process from 'node:process';
import { pathToFileURL } from 'node:url';
import { measure } from './measure.js';

const file = resolve(process.argv[2]);
const plan = JSON.parse(readFileSync(file, 'utf8'));
const require = createRequire(join(plan.packages, 'package.json'));
const native = plan.provider === 'cpu';
const found = native
  ? require.resolve('onnxruntime-node')
  : join(plan.packages, 'node_modules/onnxruntime-web/dist/ort.node.min.mjs');
const loaded = await import(pathToFileURL(found).href);
const ort = loaded.default?.InferenceSession ? loaded.default : loaded;
const options = { executionProviders: [plan.provider] };
if (native) options.intraOpNumThreads = plan.threads;
else ort.env.wasm.numThreads = plan.threads;
const read = async (path) => new Uint8Array(readFileSync(join(dirname(file), path)));
const result = await measure(ort, read, plan, options);
if (native) for (const row of Object.values(result)) delete row.heap;
console.log(JSON.stringify(result));
process.exit(0);
