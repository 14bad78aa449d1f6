"""A wing imports only from lower rows, no two files import each other, and what is private to a file stays there."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import qmpmerge

ROWS = (
    {"value"},
    {"errors", "folder", "mounts", "shield", "sockets", "users", "watch"},
    {"chain", "given"},
    {"images", "processes"},
    {"qemu"},
    {"guest", "journal"},
    {"targets"},
    {"checks", "recovery", "doctor"},
    {"engine"},
    {"operations"},
    {"testing"},
