"""A page to try a model: search texts, images and audio with any of them, see where the pooling looked.

    python app.py [--model outputs/demo/model] [--corpus outputs/demo/corpus/trimodal.jsonl]

CORPUS is a file whose texts, images and recordings are searched, each by itself; visitors may search their files
instead. As the app of a Space (`publish_vipolyqwen.py --space`), it reads the model from space.json beside it.
"""

import argparse
import json
from pathlib import Path

from vipolyqwen import __version__
from vipolyqwen.data.command_line import run_command
from vipolyqwen.serving.loading import load_model

HERE = Path(__file__).parent
DEMO = Path("outputs/demo")
CORPORA = (HERE / "corpus.jsonl", DEMO / "corpus/trimodal.jsonl")


def main(argv: list[str] | None = None) -> None:
    """Loads the model, embeds the corpus and serves the page."""
    options = read_options(argv)
    try:
        from vipolyqwen.demo.space import CSS, Page, SearchedCorpus, build_page, embed_items, read_rows
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"The page needs {error.name}; install it with: pip install -e '.[demo-app]'", name=error.name
        ) from error
    model = load_model(
        options.model, options.device, revision=options.revision, trust_remote_code=options.trust_remote_code
    )
    corpus = SearchedCorpus()
    if options.corpus is not None:
        corpus = embed_items(model.encoder, read_rows(options.corpus, options.rows))
        print("\n".join([f"{options.corpus}: {corpus.counts()}.", *corpus.refused]), flush=True)
    page = build_page(Page(model, corpus, options.title))
    page.launch(
        server_name=options.host,
        server_port=options.port,
        css=CSS,
        max_file_size="20mb",
        footer_links=[],
        ssr_mode=False,
    )


def read_options(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line; defaults come from space.json if it is there."""
    path = HERE / "space.json"
    space = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    model = str(HERE / space["folder"]) if "folder" in space else space.get("model", str(DEMO / "model"))
    corpus = next((path for path in CORPORA if path.is_file()), None)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"vipolyqwen {__version__}")
    parser.add_argument("--model", default=model, help="folder or Hub id; default: %(default)s")
    parser.add_argument("--corpus", type=Path, default=corpus, help="file of rows; default: %(default)s")
    parser.add_argument("--rows", type=int, default=80, help="rows of the corpus to embed; default: %(default)s")
    parser.add_argument("--title", default=space.get("title", "viPolyQwen"), help="of the page; default: %(default)s")
    parser.add_argument("--host", help="default: this machine only, or all of a Space")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    parser.add_argument("--device", help="such as cuda or cpu")
    parser.add_argument("--revision", default=space.get("revision"), help="branch, tag or commit of the model")
    parser.add_argument(
        "--trust_remote_code",
        action="store_true",
        default="model" in space,
        help="run a model's code from the Hub; a Space runs the code of the model that it was made for",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)
