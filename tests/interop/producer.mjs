// A producer of `dtc` in Node.js: publishes requests, several in a message, and prints a line of JSON for
// each result. usage: node producer.mjs DIRECTORY-WITH-AMQPLIB --broker URL [--namespace NAME]
//                          [--requested-at SECONDS] [--timeout SECONDS] < transactions.json
//
// It ends with 0 when all are answered, with 1 when some are not in time.

import { randomBytes } from 'node:crypto';
import { createRequire } from 'node:module';
import { text } from 'node:stream/consumers';
import { parseArgs } from 'node:util';

// What a message may hold.
const REQUESTS_MAX = 64;
const BODY_MAX = 256 * 1024;

const { positionals, values } = parseArgs({
  allowPositionals: true,
  options: {
    broker: { type: 'string' },
    namespace: { type: 'string', default: 'dtc' },
    'requested-at': { type: 'string' },
    timeout: { type: 'string', default: '60' },
  },
});
const amqp = createRequire(`${positionals[0]}/`)('amqplib');

// The bodies of the messages for these requests, which are JSON texts: arrays of as many as fit.
function* batches(requests) {
  let [batch, size] = [[], 2];
  for (const request of requests) {
    const length = Buffer.byteLength(request) + 1;
    if (batch.length === REQUESTS_MAX || (batch.length > 0 && size + length > BODY_MAX)) {
      yield `[${batch}]`;
      [batch, size] = [[], 2];
    }
    batch.push(request);
    size += length;
  }
  if (batch.length > 0) yield `[${batch}]`;
}

const transactions = JSON.parse(await text(process.stdin));
const connection = await amqp.connect(values.broker);
// The results queue is bound before any request is published.
const reply = `js-${randomBytes(6).toString('hex')}`;
const results = await connection.createChannel();
const { queue } = await results.assertQueue(`${values.namespace}.results.${reply}`, { exclusive: true });
await results.bindQueue(queue, `${values.namespace}.results`, `${reply}.*`);

const waiting = new Set(transactions.map(({ id }) => id));
const { promise: answered, resolve } = withResolvers();
if (waiting.size === 0) resolve();
await results.consume(queue, (message) => {
  for (const item of JSON.parse(message.content.toString())) {
    // A result may arrive twice.
    if (waiting.delete(item.id)) console.log(JSON.stringify(item));
  }
  results.ack(message);
  if (waiting.size === 0) resolve();
});

const requests = await connection.createConfirmChannel();
requests.on('return', ({ fields }) => {
  console.error(`no queue takes requests: ${fields.replyText}`);
  process.exit(1);
});
const texts = transactions.map((transaction) => JSON.stringify({ ...transaction, reply }));
for (const body of batches(texts)) {
  requests.publish(`${values.namespace}.requests`, 'request', Buffer.from(body), {
    contentType: 'application/json',
    type: 'dtc.request.v1',
    persistent: true,
    mandatory: true,
    // A retry, after a time-out or a crash, has the same timestamp.
    timestamp: Number(values['requested-at'] ?? Math.floor(Date.now() / 1000)),
  });
}
await requests.waitForConfirms();
console.error('sent');
const late = setTimeout(resolve, Number(values.timeout) * 1000);
await answered;
clearTimeout(late);
await connection.close();
process.exitCode = waiting.size === 0 ? 0 : 1;

function withResolvers() {
  let resolve;
  const promise = new Promise((it) => (resolve = it));
  return { promise, resolve };
}
