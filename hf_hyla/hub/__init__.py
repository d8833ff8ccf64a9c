"""From a finished run to the Hub: its card, and what is published. Reads run directories, and never trains."""
