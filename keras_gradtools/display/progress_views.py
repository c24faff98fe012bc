"""Where progress is shown: in a terminal, drawn by rich, in a notebook, or as two lines in a log file."""

import html
import sys
import time
from typing import Any

# The shortest time between two changes of a bar.
_PAUSE = 0.1


def view_of(progress):
    """The view that fits the standard output of this process."""
    if _notebook() is not None:
        return _NotebookView(progress)
    return _TerminalView(progress) if sys.stdout.isatty() else _LogView(progress)


def _notebook():
    """The functions of `IPython.display` in a notebook, else None."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if getattr(shell, "kernel", None) is None:
        return None
    from IPython import display

    return display


def _line(progress, has_failed):
    parts = [f"{'stopped after ' if has_failed else ''}{progress.count}", _duration(progress.seconds), progress.remark]
    return f"{progress.title}: {', '.join(filter(None, parts))}"


def _duration(seconds):
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds // 60)} min {int(seconds % 60)} s"


class _LogView:
    def __init__(self, progress):
        work = "" if progress.total is None else f", {progress.count.partition('/')[2]}"
        print(f"{progress.title}: started{work}", flush=True)

    def refresh(self, progress):
        pass

    def end(self, progress, has_failed):
        print(_line(progress, has_failed), flush=True)


class _TerminalView:
    def __init__(self, progress):
        # Keras itself needs rich.
        from rich import progress as bars
        from rich.console import Console
        from rich.text import Text

        class Count(bars.ProgressColumn):
            def render(self, task):
                return Text(progress.count)

        class Remark(bars.ProgressColumn):
            def render(self, task):
                return Text(progress.remark, overflow="ellipsis", no_wrap=True)

        title = bars.TextColumn("{task.description}", markup=False)
        columns = [bars.SpinnerColumn(), title] if progress.total is None else [title, bars.BarColumn(20)]
        columns += [Count(), bars.TimeElapsedColumn(), Remark()]
        self._bar = bars.Progress(*columns, console=Console(), auto_refresh=False)
        self._task = self._bar.add_task(progress.title, total=progress.total)
        self._bar.start()
        self._drawn = 0.0
        self.refresh(progress)

    def refresh(self, progress):
        if time.monotonic() - self._drawn >= _PAUSE:
            self._draw(progress)

    def end(self, progress, has_failed):
        self._draw(progress)
        self._bar.stop()

    def _draw(self, progress):
        self._bar.update(self._task, completed=progress.done)
        self._bar.refresh()
        self._drawn = time.monotonic()


class _NotebookView:
    def __init__(self, progress):
        self._display: Any = _notebook().display(_bundle(progress, False), raw=True, display_id=True)
        self._drawn = time.monotonic()

    def refresh(self, progress):
        if time.monotonic() - self._drawn >= _PAUSE:
            self._draw(progress, False)

    def end(self, progress, has_failed):
        self._draw(progress, has_failed)

    def _draw(self, progress, has_failed):
        self._display.update(_bundle(progress, has_failed), raw=True)
        self._drawn = time.monotonic()


def _bundle(progress, has_failed):
    text = _line(progress, has_failed)
    bar = "" if progress.total is None else f'<progress value="{progress.done}" max="{progress.total}"></progress> '
    return {"text/plain": text, "text/html": f"{bar}{html.escape(text)}"}
