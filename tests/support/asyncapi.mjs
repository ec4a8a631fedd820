// Checks an AsyncAPI document with the reference parser, and prints what is wrong. usage: node
// asyncapi.mjs DOCUMENT DIRECTORY-WITH-THE-PARSER

import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';

const [path, directory] = process.argv.slice(2);
const { Parser } = createRequire(directory + '/')('@asyncapi/parser');
const { document, diagnostics } = await new Parser().parse(readFileSync(path, 'utf8'));
const [ERROR, WARNING] = [0, 1];
const bad = diagnostics.filter((it) => it.severity === ERROR || it.severity === WARNING);
for (const it of bad) {
  console.log(`${path}:${it.range.start.line + 1}: ${it.path.join('.')}: ${it.message}`);
}
if (!document || bad.length > 0) process.exit(1);
const counts = [document.channels(), document.messages(), document.operations()];
console.log(`${path}: ${counts[0].length} channels, ${counts[1].length} messages, ${counts[2].length} operations`);
