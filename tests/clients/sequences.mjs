// node sequences.mjs PACKAGES FOLDER CALL: greedy tokens of an encoder-decoder model in transformers.js, as JSON.
//
// CALL: ids of the encoder, or mel features with their dims; the decoder's first token; how many to make.

import { createRequire } from 'node:module';
import { basename, dirname, join, resolve } from 'node:path';
import process from 'node:process';
import { pathToFileURL } from 'node:url';

const [packages, folder, call] = process.argv.slice(2);
const found = createRequire(join(resolve(packages), 'package.json')).resolve('@huggingface/transformers');
const loaded = await import(pathToFileURL(found).href);
const { AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq, Tensor, env } = loaded.default?.env ? loaded.default : loaded;
const { ids, features, dims, start, tokens } = JSON.parse(call);
env.allowRemoteModels = false;
env.localModelPath = dirname(resolve(folder));
const kind = ids ? AutoModelForSeq2SeqLM : AutoModelForSpeechSeq2Seq;
const model = await kind.from_pretrained(basename(resolve(folder)));
const integers = (values) => new Tensor('int64', BigInt64Array.from(values, BigInt), [1, values.length]);
const inputs = ids
  ? { input_ids: integers(ids), attention_mask: integers(ids.map(() => 1)) }
  : { input_features: new Tensor('float32', Float32Array.from(features), dims) };
const output = await model.generate({
  ...inputs,
  decoder_start_token_id: start,
  max_new_tokens: tokens,
  do_sample: false,
  // Random weights: an end that they choose says nothing.
  eos_token_id: null,
  forced_bos_token_id: null,
  forced_eos_token_id: null,
});
console.log(JSON.stringify(output.tolist()[0].map(Number)));
process.exit(0);
