"""Published figures to set beside one's own, in this project's units (fractions; MME in points of perception)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Headline:
    """A column of the comparison: a task's metric, its title, and how a figure is shown."""

    task: str
    metric: str
    title: str
    best: float
    lower_is_better: bool = False
    percent: bool = True

    @property
    def key(self) -> str:
        """The name by which published figures are kept."""
        return f"{self.task}.{self.metric}"

    def shown(self, value: float) -> str:
        """A figure as tables and images show it."""
        return f"{100 * value:.1f}" if self.percent else f"{value:.1f}" if self.best > 10 else f"{value:.2f}"


HEADLINES = (
    Headline("gqa", "accuracy", "GQA", 1.0),
    Headline("vizwiz", "accuracy", "VizWiz", 1.0),
    Headline("scienceqa", "img_accuracy", "ScienceQA-IMG", 1.0),
    Headline("textvqa", "accuracy", "TextVQA", 1.0),
    Headline("mme", "perception", "MME perception", 2000.0, percent=False),
    Headline("mmbench", "circular", "MMBench", 1.0),
    Headline("mmbench_cn", "circular", "MMBench-CN", 1.0),
    Headline("pope", "f1_mean", "POPE F1", 1.0),
    Headline("mmhal", "score", "MMHal score", 6.0, percent=False),
    Headline("mmhal", "hallucination_rate", "MMHal hallucination", 1.0, lower_is_better=True),
    Headline("object_halbench", "response_hall", "Object HalBench response", 1.0, lower_is_better=True),
    Headline("object_halbench", "object_hall", "Object HalBench object", 1.0, lower_is_better=True),
)


@dataclass(frozen=True)
class Published:
    """A model's published figures by `Headline.key`."""

    model: str
    source: str
    figures: dict[str, float]


# MME is printed there divided by 20: 69.2 stands for 1384 points.
PUBLISHED = (
    Published(
        "LLaVA-MoD-2B",
        "LLaVA-MoD, arXiv 2408.15881",
        {
            "mme.perception": 20 * 69.2,
            "mmbench.circular": 0.689,
            "object_halbench.response_hall": 0.112,
            "object_halbench.object_hall": 0.059,
        },
    ),
    Published(
        "LLaVA-MoD-1.8B",
        "as quoted by LLaVA-KD, arXiv 2410.16236",
        {
            "gqa.accuracy": 0.587,
            "vizwiz.accuracy": 0.392,
            "scienceqa.img_accuracy": 0.680,
            "textvqa.accuracy": 0.585,
            "mme.perception": 20 * 66.7,
            "mmbench.circular": 0.663,
            "mmbench_cn.circular": 0.619,
            "pope.f1_mean": 0.870,
        },
    ),
    Published(
        "LLaVA-MoD-0.5B",
        "as quoted by LLaVA-KD, arXiv 2410.16236",
        {
            "gqa.accuracy": 0.562,
            "scienceqa.img_accuracy": 0.628,
            "mme.perception": 20 * 65.3,
            "mmbench.circular": 0.588,
        },
    ),
    Published(
        "LLaVA-1.5-13B",
        "LLaVA's MODEL_ZOO",
        {
            "scienceqa.img_accuracy": 0.716,
            "textvqa.accuracy": 0.613,
            "mme.perception": 1531.3,
            "mmbench.circular": 0.677,
            "pope.f1_mean": 0.859,
        },
    ),
)

# Why a published figure is of something else than what is measured here; such figures get no difference.
NOT_COMPARABLE = {
    "vizwiz.accuracy": "published on the test split, measured here on the validation split",
    "object_halbench.response_hall": "published with objects found by GPT-3.5 (chair_llm), here by string matching",
    "object_halbench.object_hall": "published with objects found by GPT-3.5 (chair_llm), here by string matching",
}
