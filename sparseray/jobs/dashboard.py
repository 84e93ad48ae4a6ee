"""The `dashboard` command: the dashboards as one page, and with an action a Prometheus or a Grafana that shows them.

The page draws the same JSON that Grafana reads, from a Prometheus or from a run folder's own records.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sparseray.errors import UserError
from sparseray.jobs.watch.setup import DEFAULT_PROMETHEUS
from sparseray.platform.config import die
from sparseray.platform.settings import expand_path

EXAMPLE = """examples:
  python -m sparseray dashboard --run runs/first
  python -m sparseray dashboard --prometheus http://127.0.0.1:9090 --port 8400
  python -m sparseray dashboard prometheus --out prometheus
  python -m sparseray dashboard install --grafana /tmp/ray/session_latest/metrics/grafana
"""


def main(arguments: Sequence[str]) -> int:
    """Run the command, the page until Ctrl-C; 0 when it worked, 2 for a user's mistake."""
    options = parser().parse_args(list(arguments))
    try:
        run(options)
    except UserError as error:
        return die(error)
    return 0


def run(options: argparse.Namespace) -> None:
    """Do what was asked for.

    Raises:
        UserError: it cannot be done.
    """
    from sparseray.jobs.watch import setup

    if options.action == "prometheus":
        runs = [Path(expand_path(run, "--run")) for run in options.runs]
        setup.write_prometheus(Path(expand_path(options.out, "--out")), runs, options.ray)
    elif options.action == "install":
        setup.install(Path(expand_path(options.grafana, "--grafana")), options.prometheus_source)
    elif options.action == "generate":
        setup.generate(setup.PACKAGE.parents[1], check=options.check)
    else:
        from sparseray.jobs.watch import page

        folder = Path(expand_path(options.dashboards, "--dashboards")) if options.dashboards else setup.FOLDER
        boards = setup.read_dashboards(folder)
        source = page.source_of(options.prometheus, options.run and expand_path(options.run, "--run"))
        page.serve(page.create_app(source, boards), options.port)


def parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    made = argparse.ArgumentParser(
        prog="sparseray dashboard",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    source = made.add_mutually_exclusive_group()
    source.add_argument(
        "--prometheus",
        help=f"draw from the Prometheus at this address; {DEFAULT_PROMETHEUS} where nothing is named",
    )
    source.add_argument("--run", help="draw from the records of this run folder")
    made.add_argument("--port", type=int, default=8400, help="default %(default)s; 0 for a free one")
    made.add_argument("--dashboards", default="", help="folder of dashboards, ours by default")
    actions = made.add_subparsers(dest="action", metavar="ACTION", help="without one: the page")
    one = actions.add_parser(
        "prometheus", help="write a prometheus.yml with the rules that finds all live runs"
    )
    one.add_argument("--out", required=True, help="folder to write")
    one.add_argument(
        "--run",
        action="append",
        dest="runs",
        default=[],
        help="only this run folder's processes; may be repeated",
    )
    one.add_argument(
        "--ray", default="", help="address of a Ray head, such as http://127.0.0.1:8265, to scrape Ray, too"
    )
    two = actions.add_parser("install", help="put the dashboards where a Grafana reads them")
    two.add_argument(
        "--grafana",
        required=True,
        help="folder with Grafana's provisioning/, such as /etc/grafana or the one that Ray makes",
    )
    two.add_argument(
        "--prometheus",
        dest="prometheus_source",
        default=DEFAULT_PROMETHEUS,
        help="data source to add where there is none, default %(default)s",
    )
    three = actions.add_parser("generate", help="for developers: write JSON, rules and docs/metrics.md anew")
    three.add_argument("--check", action="store_true", help="write nothing; fail when a file is stale")
    return made


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
