"""Images in: sources, decoding, resampling, augmentation, masks."""
