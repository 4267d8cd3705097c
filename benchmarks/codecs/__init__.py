"""Speed of codecs with error feedback beside the limits of memory and plain torch renderings."""
