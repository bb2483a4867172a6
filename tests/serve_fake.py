"""A process with a server in front of the fake engine: `python serve_fake.py PAUSE DRAIN` prints its URL."""

import sys

from api_calls import says, server

from dsv3.serving.api.server import serve

if __name__ == "__main__":
    app = server(says("the cat sat on the mat", pause=float(sys.argv[1])))
    sys.exit(serve(app, port=0, drain=float(sys.argv[2]), listening=lambda url: print(url, flush=True)))
