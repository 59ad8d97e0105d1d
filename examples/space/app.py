"""A Space that shows where images leave a network. The page itself is `hf_scan.demo`."""

import os

from hf_scan.demo.page import build_page, launch_page


demo = build_page(os.environ.get("MODEL", "model"))

if __name__ == "__main__":
    launch_page(demo, server_name=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"))
