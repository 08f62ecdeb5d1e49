// Seconds of the exported model and of its float twin in each round, in transformers.js.
//
// `plan`: kind ('text-generation' or another pipeline), models (two names), text, tokens, rounds,
// device (undefined: the default).

class Clock {
  times = [];

  put() {
    this.times.push(performance.now());
  }

  end() {}
}

async function generator(library, name, { text, tokens, device }) {
  const tokenizer = await library.AutoTokenizer.from_pretrained(name);
  const model = await library.AutoModelForCausalLM.from_pretrained(name, { device });
  const chat = [{ role: 'user', content: text }];
  const inputs = tokenizer.apply_chat_template(chat, { add_generation_prompt: true, return_dict: true });
  return async () => {
    const streamer = new Clock();
    await model.generate({ ...inputs, max_new_tokens: tokens, do_sample: false, streamer });
    // The prompt is put first, then each token.
    return (streamer.times.at(-1) - streamer.times[1]) / 1000;
  };
}

async function caller(library, name, { kind, text, device }) {
  const run = await library.pipeline(kind, name, { device });
  return async () => {
    const begin = performance.now();
    for (let call = 0; call < 3; call += 1) await run(text);
    return (performance.now() - begin) / 1000;
  };
}

export async function turns(library, plan) {
  const prepare = plan.kind === 'text-generation' ? generator : caller;
  const measures = [];
  for (const name of plan.models) measures.push(await prepare(library, name, plan));
  const found = [];
  for (let round = 0; round < plan.rounds; round += 1) {
    found.push([]);
    for (const measure of measures) found.at(-1).push(await measure());
  }
  return found;
}
