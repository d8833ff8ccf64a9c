"""The demo: a page on which models are asked. Needs the extra `demo`."""
