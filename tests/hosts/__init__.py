"""The zoo: tiny random models of every host family, for the laws."""

from .checks import CHECKS
from .host import Host, Inputs, Padded
from .releases import here
from .text import TEXT_HOSTS
from .vision import VISION_HOSTS

HOSTS: dict[str, Host] = {host.name: here(host) for host in (*TEXT_HOSTS, *VISION_HOSTS)}

__all__ = ["CHECKS", "HOSTS", "Host", "Inputs", "Padded"]
