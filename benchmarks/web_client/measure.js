// Time models in one runtime, in turns: the same code in Node.js and in a browser.

const TOKEN = 7;

// The memory of WebAssembly never shrinks, so its size is its peak, and only the first model has one
// of its own. It has no name outside the runtime: note it when the runtime makes it.
const memories = [];
const Memory = WebAssembly.Memory;
WebAssembly.Memory = class extends Memory {
  constructor(...words) {
    super(...words);
    memories.push(this);
  }
};
const heap = () => Math.max(0, ...memories.map((memory) => memory.buffer.byteLength));

function numbers(count) {
  let state = 1;
  return Float32Array.from({ length: count }, () => {
    state = (state * 1103515245 + 12345) % 2147483648;
    return state / 1073741824 - 1;
  });
}

async function layerTasks(ort, session, { width, rows, calls }) {
  const tasks = {};
  for (const count of rows) {
    const task = `${count} rows`;
    const x = new ort.Tensor('float32', numbers(count * width), [count, width]);
    const feeds = { [session.inputNames[0]]: x };
    tasks[task] = async () => {
      for (let call = 1; call < calls[task]; call += 1) dispose(await session.run(feeds));
      return first(await session.run(feeds), session.outputNames[0]);
    };
  }
  return tasks;
}

async function first(outputs, name) {
  const values = Array.from(await outputs[name].getData()).slice(0, 8);
  dispose(outputs);
  return values;
}

const dispose = (outputs) => Object.values(outputs).forEach((value) => value.dispose());

function largest(values) {
  let best = 0;
  for (let index = 1; index < values.length; index += 1) if (values[index] > values[best]) best = index;
  return best;
}

async function decoderTasks(ort, session, { prompt, tokens, heads, width }) {
  const pasts = session.inputNames.filter((name) => name.startsWith('past_key_values'));
  const whole = (values) => new ort.Tensor('int64', BigInt64Array.from(values, BigInt), [1, values.length]);
  let state;

  async function step(ids) {
    const past = state?.length ?? 0;
    const length = past + ids.length;
    const feeds = { input_ids: whole(ids), attention_mask: whole(new Array(length).fill(1)) };
    const places = ids.map((_, index) => past + index);
    if (session.inputNames.includes('position_ids')) feeds.position_ids = whole(places);
    for (const name of pasts) {
      feeds[name] = state?.cache[name] ?? new ort.Tensor('float32', new Float32Array(0), [1, heads, 0, width]);
    }
    const outputs = await session.run(feeds);
    const logits = await outputs.logits.getData();
    const size = outputs.logits.dims.at(-1);
    outputs.logits.dispose();
    if (state) Object.values(state.cache).forEach((value) => value.dispose());
    const cache = Object.fromEntries(
      pasts.map((name) => [name, outputs[name.replace('past_key_values', 'present')]]),
    );
    state = { cache, length };
    return largest(logits.subarray(logits.length - size));
  }

  async function begin() {
    if (state) Object.values(state.cache).forEach((value) => value.dispose());
    state = undefined;
    return [await step(prompt)];
  }

  async function decode() {
    const made = [];
    let token = TOKEN;
    for (let index = 0; index < tokens; index += 1) {
      token = await step([token]);
      made.push(token);
    }
    return made;
  }
  return { prompt: begin, decode };
}

const MAKERS = { layer: layerTasks, decoder: decoderTasks };

/**
 * Median and more are left to the caller: this returns each round's milliseconds.
 *
 * @param {object} ort The runtime.
 * @param {(path: string) => Promise<Uint8Array>} read Reads a file of the plan.
 * @param {{kind: string, models: object[], rounds: number}} plan What to run.
 * @param {object} options Of each session.
 */
export async function measure(ort, read, plan, options) {
  const found = {};
  const tasks = {};
  for (const { name, file, settings } of plan.models) {
    try {
      const bytes = await read(file);
      const started = performance.now();
      const session = await ort.InferenceSession.create(bytes, { ...options, ...settings });
      const seconds = (performance.now() - started) / 1000;
      tasks[name] = await MAKERS[plan.kind](ort, session, plan);
      found[name] = { bytes: bytes.length, load: seconds, times: {}, values: {} };
      if (Object.keys(tasks).length === 1) found[name].heap = heap();
      for (const [task, run] of Object.entries(tasks[name])) found[name].values[task] = await run();
    } catch (error) {
      delete tasks[name];
      found[name] = { refused: String(error.message ?? error) };
    }
  }
  for (let round = 0; round < plan.rounds; round += 1) {
    const names = Object.keys(tasks);
    for (const task of Object.keys(Object.values(tasks)[0] ?? {})) {
      for (let turn = 0; turn < names.length; turn += 1) {
        const name = names[(turn + round) % names.length];
        const started = performance.now();
        await tasks[name][task]();
        (found[name].times[task] ??= []).push((performance.now() - started) / (plan.calls?.[task] ?? 1));
      }
    }
  }
  return found;
}
