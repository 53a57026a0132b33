// The same work for workerd: one isolate for all requests.
function summed(document) {
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
  const memory = new Uint8Array(32 << 20);
  let pages = 0;
  for (let at = 0; at < memory.length; at += 4096, pages++) memory[at] = 1;
  return `touched ${pages} pages\n`;
}

export default {
  async fetch(request) {
    const path = new URL(request.url).pathname;
    if (path === "/json") return new Response(summed(await request.json()));
    return new Response(path === "/touch" ? touched() : "hello\n");
  },
};
