// Answers hello: what a request costs that needs a JavaScript engine of its own.
import { Fields, OutgoingBody, OutgoingResponse, ResponseOutparam } from "wasi:http/types@0.2.12";

const BODY = new TextEncoder().encode("hello\n");

export const incomingHandler = {
  handle(request, out) {
    const length = new TextEncoder().encode(String(BODY.length));
    const response = new OutgoingResponse(Fields.fromList([["content-length", length]]));
    const body = response.body();
    ResponseOutparam.set(out, { tag: "ok", val: response });
    const stream = body.write();
    stream.blockingWriteAndFlush(BODY);
    stream[Symbol.dispose]();
    OutgoingBody.finish(body, undefined);
  },
};
