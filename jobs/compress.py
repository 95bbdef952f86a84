#!/usr/bin/env python3
"""Images to files that any prefix of shows: python jobs/compress.py encode --run RUN --images a.png b.png --output coded

python jobs/compress.py decode --run RUN --files coded --output images    back, bit for bit; --partial for files that were cut
python jobs/compress.py curve --run RUN --data SHARDS --output curve      rate and distortion beside theory, PNG, JPEG and WebP
"""

import sys

from ddpm_core.errors import InputError, did_you_mean
from jobs.cli import parse, run, say
from pipelines import compress
from pipelines.compress.config import CurveConfig, DecodeConfig, EncodeConfig


def main() -> None:
    match sys.argv[1:]:
        case ["encode", *rest]:
            about = "Code images losslessly, so that any prefix of a file shows the image at the rate it holds."
            encoding = parse(EncodeConfig, rest, description=about, first="encode")
            say(f"encode: {compress.encode_files(encoding, say).describe()}")
        case ["decode", *rest]:
            about = "Decode coded files, bit for bit, or as far as they go."
            decoding = parse(DecodeConfig, rest, description=about, first="decode")
            say(f"decode: {compress.decode_files(decoding, say).describe()}")
        case ["curve", *rest]:
            about = "Measure rate and distortion of coded files beside the theory, PNG, JPEG and WebP."
            config = parse(CurveConfig, rest, description=about, first="curve")
            for line in compress.describe_curve(compress.measure_curve(config, say)):
                say(f"curve: {line}")
        case ["--help" | "-h"]:
            print(__doc__)
        case arguments:
            words = ["encode", "decode", "curve"]
            given = (
                f"{arguments[0]!r} is unknown{did_you_mean(arguments[0], words)}"
                if arguments
                else "no command is given"
            )
            raise InputError(f"{given}: put one of {', '.join(words)} first, and see python jobs/compress.py --help")


if __name__ == "__main__":
    run(main)
