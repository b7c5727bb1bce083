"""`turbo-opt calibrate`: what is learned from data."""

from __future__ import annotations

import click

from turbo_opt.cli.calibrate_convert import convert
from turbo_opt.cli.calibrate_data import data
from turbo_opt.cli.calibrate_rcm import rcm
from turbo_opt.cli.calibrate_router import router
from turbo_opt.cli.calibrate_scales import scales
from turbo_opt.cli.calibrate_sla import sla
from turbo_opt.cli.group import SuggestingGroup


@click.group(cls=SuggestingGroup)
def calibrate() -> None:
    """Make training data from a teacher, and tune models on it."""


calibrate.add_command(data)
calibrate.add_command(sla)
calibrate.add_command(router)
calibrate.add_command(rcm)
calibrate.add_command(scales)
calibrate.add_command(convert)
