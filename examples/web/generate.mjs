// Stream a language model's answer in Node.js, from an edge folder.
//
//   npm install --ignore-scripts
//   node generate.mjs ../../edge "What is the capital of France?" [TOKENS] [--json]

import { basename, dirname, resolve } from 'node:path';
import process from 'node:process';
import { AutoModelForCausalLM, AutoTokenizer, TextStreamer, env } from '@huggingface/transformers';

const [folder, prompt, tokens = '64'] = process.argv.slice(2).filter((word) => !word.startsWith('--'));
const json = process.argv.includes('--json');
if (!folder || !prompt) {
  console.error('usage: node generate.mjs EDGE PROMPT [TOKENS] [--json]');
  process.exit(2);
}

env.allowRemoteModels = false;
env.localModelPath = dirname(resolve(folder));
const name = basename(resolve(folder));

const tokenizer = await AutoTokenizer.from_pretrained(name);
const model = await AutoModelForCausalLM.from_pretrained(name);
const chat = [{ role: 'user', content: prompt }];
const inputs = tokenizer.chat_template
  ? tokenizer.apply_chat_template(chat, { add_generation_prompt: true, return_dict: true })
  : tokenizer(prompt);

const started = performance.now();
const output = await model.generate({
  ...inputs,
  max_new_tokens: Number(tokens),
  do_sample: false,
  streamer: json ? undefined : new TextStreamer(tokenizer, { skip_prompt: true, skip_special_tokens: true }),
});
const seconds = (performance.now() - started) / 1000;
const ids = output.tolist()[0].map(Number);
const made = ids.length - inputs.input_ids.dims[1];
if (json) console.log(JSON.stringify({ ids, new_tokens: made, seconds }));
else console.log(`\n${made} tokens, ${(made / seconds).toFixed(1)} tokens/s with the prompt`);
