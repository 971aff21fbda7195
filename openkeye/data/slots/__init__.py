"""FrameForge clips with many slots behind one video: what `recipes/tiny.py` made openkeye-tiny's first weights from."""
