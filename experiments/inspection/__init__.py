"""The command `inspect`: what a run's network computes for one text, on a page of HTML.

capture.py runs the network and records; pieces.py turns tokens into text; page.py makes the page, whose style and
script are in page.css and page.js.
"""
