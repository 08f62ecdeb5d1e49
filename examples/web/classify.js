// A classifier: the classes of the text in the page, with their probabilities.

import { pipeline } from '@huggingface/transformers';
import { device, element, model as name, reported, say } from './session.js';

const classify = await reported(() => pipeline('text-classification', name, { device }));

element('form').addEventListener('submit', async (event) => {
  event.preventDefault();
  const started = performance.now();
  const found = await reported(() => classify(element('text').value, { top_k: null }));
  const lines = found.map(({ label, score }) => `${label}: ${(100 * score).toFixed(1)} %`);
  element('answer').textContent = lines.join('\n');
  say(`${(performance.now() - started).toFixed(0)} ms on ${device}`);
  document.body.dataset.found = JSON.stringify(found);
  document.body.dataset.state = 'answered';
});

say(`Ready on ${device}.`);
element('ask').disabled = false;
document.body.dataset.state = 'ready';
