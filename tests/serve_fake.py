"""A process with a server in front of the fake engine: `python serve_fake.py PAUSE DRAIN` prints its URL."""

import asyncio
import sys

from api_calls import says, server

from dsv3.serving.api.server import listen, serve

if __name__ == "__main__":
    listener = listen("127.0.0.1", 0)
    print("http://{}:{}".format(*listener.getsockname()), flush=True)
    app = server(says("the cat sat on the mat", pause=float(sys.argv[1])))
    sys.exit(asyncio.run(serve(app, listener, float(sys.argv[2]))))
