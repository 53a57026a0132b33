"""Answers hello: what a request costs that needs a Python interpreter of its own."""

from componentize_py_types import Ok
from wit_world import exports
from wit_world.imports.types import Fields, OutgoingBody, OutgoingResponse, ResponseOutparam

BODY = b"hello\n"


class IncomingHandler(exports.IncomingHandler):
    def handle(self, request, out):
        headers = Fields.from_list([("content-length", str(len(BODY)).encode())])
        response = OutgoingResponse(headers)
        body = response.body()
        ResponseOutparam.set(out, Ok(response))
        with body.write() as stream:
            stream.blocking_write_and_flush(BODY)
        OutgoingBody.finish(body, None)
