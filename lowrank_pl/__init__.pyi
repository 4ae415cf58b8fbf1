# The public names, and the modules that they are imported from on first use; `lazy_loader.attach_stub` reads this file.

from .calibration.build import build_factors as build_factors
from .calibration.subject import Subject as Subject
from .evaluate.generation import generate_samples as generate_samples
from .evaluate.likelihood import Score as Score
from .evaluate.likelihood import excess_nats as excess_nats
from .evaluate.likelihood import perplexity as perplexity
from .export.export import load_compressed as load_compressed
from .export.export import save_compressed as save_compressed
from .export.hub import HubRepo as HubRepo
from .factors.components import AnySize as AnySize
from .factors.compression import compress as compress
from .factors.compression import compressed as compressed
from .factors.compression import restore_dense as restore_dense
from .factors.settings import Decomposition as Decomposition
from .methods.allocate.run import allocate_ranks as allocate_ranks
from .methods.quantize.byte_budget import allocate_bytes as allocate_bytes
from .methods.quantize.quantizing import quantize as quantize
from .methods.quantize.settings import ByteBudget as ByteBudget
from .methods.quantize.settings import Rounding as Rounding
from .models.base import Base as Base
from .models.base import load_base as load_base
from .models.base import load_tokenizer as load_tokenizer
from .models.hf_layers import LowRankLinear as LowRankLinear
from .models.hf_layers import PivotedLinear as PivotedLinear
from .models.hf_quantized import Grid as Grid
from .models.targets import find_targets as find_targets
from .plans.budget import Budget as Budget
from .plans.constraints import Constraints as Constraints
from .plans.plan import ModulePlan as ModulePlan
from .plans.plan import RankPlan as RankPlan
from .report.comparison import comparison_plot as comparison_plot
from .report.rank_map import rank_map as rank_map
from .report.rank_map import rank_table as rank_table
from .report.scores import Row as Row
from .report.scores import row_table as row_table
from .serving.optimize import Optimized as Optimized
from .serving.optimize import optimize_for_inference as optimize_for_inference
from .text.sequences import Calibration as Calibration
from .text.sequences import token_windows as token_windows
from .training.data import CalibrationData as CalibrationData
from .training.finish_run import FinishRun as FinishRun
from .training.module import RankLearner as RankLearner
from .training.rank_monitor import RankMonitor as RankMonitor
from .training.text_samples import TextSamples as TextSamples

__version__: str
