"""Progress in a log file, a terminal and a notebook: one bar, in its place and with its count."""

import functools
import io
import sys
import types

import keras
import numpy as np
import pytest

import keras_gradtools as kg
from keras_gradtools.display import progress, progress_views
from keras_gradtools.display.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """Called in a test, because pytest replaces the output between a fixture and its test."""
    return functools.partial(in_terminal, monkeypatch)


def in_terminal(monkeypatch, call):
    made = Terminal()
    monkeypatch.setattr(sys, "stdout", made)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setattr(progress_views, "_PAUSE", 0.0)
    call()
    return made.getvalue()


def work(total=3, parts=3, verbose=1, **options):
    with Progress(total, "work", verbose, **options) as bar:
        for i in range(parts):
            bar.note(f"residual {i}")
            bar.update()


class TestLog:
    def test_two_lines(self, capsys):
        work(1000, 1000, unit="batch")
        first, last = capsys.readouterr().out.splitlines()
        assert first == "work: started, 1000 batches" and last.startswith("work: 1000/1000 batches, 0.")
        assert last.endswith("s, residual 999")

    def test_an_unknown_number(self, capsys):
        work(None, 40)
        first, last = capsys.readouterr().out.splitlines()
        assert first == "work: started" and last.startswith("work: 40 products, ")

    def test_a_failure(self, capsys):
        with pytest.raises(ZeroDivisionError), Progress(4, "work", 1, "loss") as bar:
            bar.update()
            raise ZeroDivisionError
        assert "work: stopped after 1/4 losses, " in capsys.readouterr().out

    @pytest.mark.parametrize("verbose", [0, "auto"])
    def test_nothing(self, capsys, verbose):
        work(verbose=verbose)
        assert capsys.readouterr().out == ""

    def test_after_some_time(self, capsys, monkeypatch):
        monkeypatch.setattr(progress.Progress, "QUIET_SECONDS", 0.0)
        work(verbose="auto")
        assert "3/3 products" in capsys.readouterr().out

    def test_nothing_without_interactive_logging(self, capsys):
        keras.config.disable_interactive_logging()
        try:
            work()
        finally:
            keras.config.enable_interactive_logging()
        assert capsys.readouterr().out == ""

    def test_one_in_another(self, capsys):
        seen = []
        with Progress(2, "outer", 1) as outer:
            for _ in range(2):
                with Progress(3, "inner", 1) as inner:
                    inner.update()
                    seen.append(outer.remark)
                    inner.note("remark")
                    seen.append(outer.remark)
                assert outer.remark == ""
                outer.update()
        assert seen[:2] == ["inner: 1/3 products", "inner: 1/3 products, remark"]
        assert len(capsys.readouterr().out.splitlines()) == 2

    def test_minutes(self):
        assert progress_views._duration(59.0) == "59.0 s" and progress_views._duration(125.0) == "2 min 5 s"


class TestTerminal:
    def test_a_bar(self, terminal):
        found = terminal(work)
        last = found.rpartition("\r")[2]
        assert "work" in last and "3/3 products" in last and "residual 2" in last
        assert found.count("\n") == 1

    def test_a_spinner(self, terminal):
        found = terminal(functools.partial(work, None, 5))
        assert "5 products" in found and "/None" not in found and found.count("\n") == 1

    def test_markup_in_titles(self, terminal):
        def marked():
            with Progress(1, "[red]a[/nothing]", 1) as bar:
                bar.note("[b]")
                bar.update()

        found = terminal(marked)
        assert "[red]a[/nothing]" in found and "[b]" in found


def test_notebook(monkeypatch, capsys):
    shown = []

    class Handle:
        def update(self, bundle, raw):
            shown.append(bundle)

    def display(bundle, raw, display_id):
        shown.append(bundle)
        return Handle()

    functions = types.SimpleNamespace(display=display)
    monkeypatch.setattr(progress_views, "_notebook", lambda: functions)
    with Progress(2, "a < b", 1) as bar:
        bar.update()
        bar.update()
    assert "2/2 products" in shown[-1]["text/plain"] and 'value="2" max="2"' in shown[-1]["text/html"]
    assert "a &lt; b" in shown[-1]["text/html"] and capsys.readouterr().out == ""


def test_no_notebook_here():
    assert progress_views._notebook() is None


def test_eigenvalues_and_a_surface(capsys):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    x = np.random.default_rng(0).normal(size=(8, 3)).astype("float32")
    hessian = kg.curvature.Hessian(model, "mse", (x, x[:, :2]), verbose=1)
    kg.curvature.loss_surface(hessian, points=3)
    lines = capsys.readouterr().out.splitlines()
    assert "2 of 2 eigenvalues converged, residual " in lines[1] and "products" in lines[1]
    assert lines[2] == "Hessian.loss_surface: started, 9 losses" and "9/9 losses" in lines[3] and len(lines) == 4
