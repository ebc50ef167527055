"""The live view: dashboards without Grafana, from Prometheus or from the last minutes in memory.

samples, windows, vectors, promql    pure: samples and an expression in, series out
ring, scrape                         what the cluster's pages said lately, and who asks for them
prometheus, page                     the same question to a Prometheus; the HTTP side of both
static/                              the page itself (uplot.js and uplot.css are uPlot 1.6.32, MIT)
"""
