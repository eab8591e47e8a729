"""Looking at graphs: capture, the pass pipeline, inspection."""
