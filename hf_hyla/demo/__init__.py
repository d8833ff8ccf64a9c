"""The demo, a page for trying models. It needs the extra `demo`."""
