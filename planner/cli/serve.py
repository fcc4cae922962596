"""``planner serve``: the best deployments of a model for some traffic and its promises."""

from __future__ import annotations

from planner.cli.options import Json, PlansFile, with_options
from planner.cli.serve_options import ServeOptions

__all__ = ["serve"]


@with_options
def serve(asked: ServeOptions, out: PlansFile = None, as_json: Json = False) -> None:
    """Find the deployments that answer most within their promises, or take fewest devices for a rate.

    Prompts and generation in one pool, or in pools of their own; every mesh, budget of an iteration and number of replicas.
    """
    from planner.cli.output import json_text, plans_file, print_json
    from planner.serving.daily import over_a_day
    from planner.serving.serve import serve as search

    problem, top, day = asked.read()
    with plans_file(out) as file:
        result = search(problem, top)
        if day is not None:
            result = over_a_day(result, problem, *day)
        content = result.as_dict()
        if file is not None:
            file.write(json_text(content) + "\n")
    if as_json:
        print_json(content)
    else:
        from planner.report.serving import show_serving

        show_serving(result, problem, out)
