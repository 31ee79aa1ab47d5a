"""From the table of series to prometheus_client: what is filled as things happen, and what is read at a scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeAlias

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.metrics.series import SERIES, Kind, Series

Family: TypeAlias = CounterMetricFamily | GaugeMetricFamily
Sample: TypeAlias = tuple[str, tuple[str, ...], float]  # a name in SERIES, the labels' values, the value


def counter(name: str, registry: CollectorRegistry) -> Counter:
    series = _series(name, Kind.COUNTER)
    return Counter(name, series.help, series.labels, registry=registry)


def gauge(name: str, registry: CollectorRegistry) -> Gauge:
    series = _series(name, Kind.GAUGE)
    return Gauge(name, series.help, series.labels, registry=registry)


def histogram(name: str, registry: CollectorRegistry) -> Histogram:
    series = _series(name, Kind.HISTOGRAM)
    return Histogram(name, series.help, series.labels, buckets=series.buckets, registry=registry)


def family(name: str) -> Family:
    """An empty family, to be filled at a scrape."""
    series = SERIES[name]
    assert series.kind is not Kind.HISTOGRAM, f"{name} is filled as things happen"
    make = CounterMetricFamily if series.kind is Kind.COUNTER else GaugeMetricFamily
    return make(name, series.help, labels=series.labels)


class Scraped(Collector):
    """Series that `read` gives at every scrape, in the scraping thread. One without a sample is absent, not 0."""

    def __init__(self, names: Sequence[str], read: Callable[[], Iterable[Sample]]) -> None:
        self._names = names
        self._read = read

    def describe(self) -> Iterator[Metric]:
        """Names only: registering reads nothing."""
        return iter([family(name) for name in self._names])

    def collect(self) -> Iterator[Metric]:
        families = {name: family(name) for name in self._names}
        for name, labels, value in self._read():
            families[name].add_metric(labels, value)
        return iter(families.values())


def _series(name: str, kind: Kind) -> Series:
    series = SERIES[name]
    assert series.kind is kind, f"{name} is a {series.kind}"
    return series
