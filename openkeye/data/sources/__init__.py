"""Where samples come from: readers of files, and FrameForge, which draws its own."""
