// A language model that streams its answer into the page.

import { AutoModelForCausalLM, AutoTokenizer, TextStreamer } from '@huggingface/transformers';
import { device, element, model as name, reported, say, tokens } from './session.js';

const [tokenizer, model] = await reported(() =>
  Promise.all([
    AutoTokenizer.from_pretrained(name),
    AutoModelForCausalLM.from_pretrained(name, { device }),
  ]),
);

async function answer(prompt) {
  const inputs = tokenizer.apply_chat_template([{ role: 'user', content: prompt }], {
    add_generation_prompt: true,
    return_dict: true,
  });
  element('answer').textContent = '';
  let made = 0;
  let first = 0;
  const streamer = new TextStreamer(tokenizer, {
    skip_prompt: true,
    skip_special_tokens: true,
    callback_function: (text) => element('answer').append(text),
    token_callback_function: () => {
      made += 1;
      first ||= performance.now();
    },
  });
  const output = await model.generate({ ...inputs, max_new_tokens: tokens, do_sample: false, streamer });
  const seconds = (performance.now() - first) / 1000;
  say(`${made} tokens, ${((made - 1) / seconds).toFixed(1)} tokens/s on ${device}`);
  return output.tolist()[0].map(Number);
}

element('form').addEventListener('submit', async (event) => {
  event.preventDefault();
  element('ask').disabled = true;
  say('Answering …');
  const ids = await reported(() => answer(element('prompt').value));
  document.body.dataset.ids = JSON.stringify(ids);
  document.body.dataset.state = 'answered';
  element('ask').disabled = false;
});

say(`Ready on ${device}.`);
element('ask').disabled = false;
document.body.dataset.state = 'ready';
