// Node's own HTTP server, doing the same work as the guests.
import { createServer } from "node:http";

function summed(text) {
  const document = JSON.parse(text);
  document.total = 0;
  for (const order of document.orders) {
    order.customer = order.customer.toUpperCase();
    order.total = 0;
    for (const line of order.lines) {
      line.total = line.quantity * line.cents;
      order.total += line.total;
    }
    document.total += order.total;
  }
  return JSON.stringify(document);
}

function touched() {
  const memory = Buffer.allocUnsafeSlow(32 << 20);
  let pages = 0;
  for (let at = 0; at < memory.length; at += 4096, pages++) memory[at] = 1;
  return `touched ${pages} pages\n`;
}

function answer(response, body) {
  response.writeHead(200, { "content-type": "text/plain; charset=utf-8", "content-length": Buffer.byteLength(body) });
  response.end(body);
}

createServer((request, response) => {
  if (request.url === "/json") {
    const pieces = [];
    request.on("data", (piece) => pieces.push(piece));
    request.on("end", () => answer(response, summed(Buffer.concat(pieces).toString())));
  } else {
    answer(response, request.url === "/touch" ? touched() : "hello\n");
  }
}).listen(Number(process.argv[2]), "127.0.0.1");
