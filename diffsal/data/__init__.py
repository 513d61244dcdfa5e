"""From files to pixels, labels and human maps."""
