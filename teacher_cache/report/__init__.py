"""`cache-teacher report`: what a cache holds and what the teacher predicted, as one self-contained HTML page.

`scan` decodes positions, `sets` finds the samples, `rankings` unusual sequences; `figures` and `browser` prepare
the data, and `page` renders it with `page.html.jinja`, `page.css` and `page.js`.
"""
