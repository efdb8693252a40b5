"""`visionpulse plot`: draw a saved trace again, without the model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..trace.layout import PictureGrid, picture_from
from ..trace.record import Trace
from .parser import at_least, failure, parser_of


def main(argv: Sequence[str] | None = None) -> int:
    """Write a page (.html) or a plot (.png, .pdf, .svg) of a trace."""
    example = "visionpulse plot trace.npz --picture chart.png --grid 24x32"
    parser = parser_of("plot", main.__doc__ or "", example)
    parser.add_argument("trace", type=Path, help="what trace.save(path) wrote")
    parser.add_argument("--out", type=Path, help="default: the trace's name with .html")
    parser.add_argument(
        "--picture",
        action="append",
        default=[],
        type=Path,
        help="in the prompt's order, repeatable",
    )
    parser.add_argument(
        "--grid", action="append", default=[], metavar="ROWSxCOLUMNS",
        help="tokens of each picture after merging; one for all, or one each",
    )  # fmt: skip
    parser.add_argument("--tokenizer", help="folder or name, to show tokens as text")
    parser.add_argument(
        "--conversation", type=at_least(0), default=0, help="of a plot; a page has all"
    )
    parser.add_argument("--row", type=at_least(0), default=0, help="of a plot; a page has all")
    args = parser.parse_args(argv)
    if not args.trace.exists():
        parser.error(f"no file {args.trace}; record one with patch(model, record=True)")
    out: Path = args.out or args.trace.with_suffix(".html")
    try:
        trace = Trace.load(args.trace)
        pictures = _pictures(args.picture, args.grid)
        options: dict[str, Any] = {"pictures": pictures, "tokenizer": _tokenizer(args.tokenizer)}
        if out.suffix == ".html":
            trace.to_html(out, title=args.trace.stem, **options)
        else:
            trace.plot(out, conversation=args.conversation, row=args.row, **options)
    except (ValueError, ImportError, OSError) as error:
        return failure("plot", error)
    print(out)
    return 0


def _pictures(pictures: Sequence[Path], grids: Sequence[str]) -> list[PictureGrid] | None:
    """Pictures with their grids; None leaves the layout to the trace."""
    if not pictures and not grids:
        return None
    sizes = [_grid(text) for text in grids]
    count = max(len(pictures), len(sizes))
    if len(sizes) == 1:
        sizes *= count
    if len(sizes) != count or (pictures and len(pictures) != count):
        raise ValueError(
            f"{len(pictures)} pictures and {len(grids)} grids; give one grid for all or one each"
        )
    if not pictures:
        return [PictureGrid(*size) for size in sizes]
    return [
        PictureGrid(*size, picture_from(path), path.name)
        for size, path in zip(sizes, pictures, strict=True)
    ]


def _grid(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    if not (rows.isdigit() and columns.isdigit()):
        raise ValueError(f"a grid is ROWSxCOLUMNS, for example 24x32, got {text!r}")
    return int(rows), int(columns)


def _tokenizer(name: str | None) -> Any:
    if name is None:
        return None
    from transformers import AutoTokenizer

    tokenizers: Any = AutoTokenizer
    return tokenizers.from_pretrained(name)
