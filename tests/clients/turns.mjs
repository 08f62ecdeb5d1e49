// node turns.mjs PACKAGES MODELS PLAN: turns.js in Node.js; MODELS holds the folders of the plan's models.

import { createRequire } from 'node:module';
import { join, resolve } from 'node:path';
import process from 'node:process';
import { pathToFileURL } from 'node:url';
import { turns } from './turns.js';

const [packages, models, plan] = process.argv.slice(2);
const found = createRequire(join(resolve(packages), 'package.json')).resolve('@huggingface/transformers');
const loaded = await import(pathToFileURL(found).href);
const library = loaded.default?.env ? loaded.default : loaded;
library.env.allowRemoteModels = false;
library.env.localModelPath = resolve(models);
console.log(JSON.stringify(await turns(library, JSON.parse(plan))));
process.exit(0);
