"""Self-contained pages: one HTML file that includes its style and charts.

    page = Page("Training run", "SmolLM2-135M, 200 steps")
    page.section("Loss", "Lower is better.")
    page.chart(line_chart({"train": (steps, losses)}, x="step", y="loss"))
    page.table(("layer", "bits"), [("q", 4), ("k", 3)], caption="What was chosen.")
    page.write("run/report.html")

Needs the extra `report`. This package is independent of models: it takes numbers and texts only.
"""

from qalora_compile.pages.charts import Chart, histogram, line_chart
from qalora_compile.pages.numbers import number_text, percent
from qalora_compile.pages.page import Mark, Page

__all__ = ["Chart", "Mark", "Page", "histogram", "line_chart", "number_text", "percent"]
