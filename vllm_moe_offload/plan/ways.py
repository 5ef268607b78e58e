"""temporary"""

from enum import StrEnum


class Way(StrEnum):
    RESIDENT = "resident"
    DEVICE = "device"
    HOST = "host"


def gpu_way(**k):
    return Way.HOST, "x"
