"""The teacher cache: written by running a teacher once, read by any number of students.

`open_cache` opens a `TeacherCache` by path or URL; `check_student` compares its tokenizer with a student's, and
`check_labels` compares a batch's labels with the records joined to them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llavamod_offline import __version__
from llavamod_offline.lazy import lazy_exports

if TYPE_CHECKING:
    from teacher_cache.read.reader import TeacherCache, open_cache
    from teacher_cache.student.check import check_student
    from teacher_cache.student.labels import check_labels

__all__ = ["TeacherCache", "__version__", "check_labels", "check_student", "open_cache"]
__getattr__, __dir__ = lazy_exports(
    __name__,
    {"read.reader": "TeacherCache open_cache", "student.check": "check_student", "student.labels": "check_labels"},
)
