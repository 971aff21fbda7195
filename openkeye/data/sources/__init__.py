"""Where samples come from: readers of files, found by name (`opening.py`), and FrameForge, which draws its own."""
