"""From a finished run to the Hub: its card, and what is published. This part reads the folders of runs, and never trains."""
