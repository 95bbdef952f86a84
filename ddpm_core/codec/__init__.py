"""A trained model as a codec: Algorithm 3 (sending) and Algorithm 4 (receiving) as files."""

from ddpm_core.codec.codec import Codec, Coded, Decoded

__all__ = ["Codec", "Coded", "Decoded"]
