"""Asks {{ models }}. The page is that of `hyla demo`, whose code is in hf_hyla/ beside this file."""

from hf_hyla.demo.app import LAUNCH, page


MODELS = "{{ models }}"
demo = page(MODELS.split(", "))

if __name__ == "__main__":
    demo.launch(**LAUNCH)
