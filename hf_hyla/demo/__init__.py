"""The demo, a page on which people ask models. It needs the extra `demo`."""
