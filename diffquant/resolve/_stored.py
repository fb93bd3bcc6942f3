"""Rule 5b: components that the base itself stores quantized."""

from diffquant import headers, planner
from diffquant.errors import FormatError
from diffquant.resolve._flags import flag_for
from diffquant.resolve._pipelines import base_component
from diffquant.resolve._rules import PLAIN_FORMAT, Log
from diffquant.sources import PipelineFolder


def rule_5b_stored_quantized(name: str, pipeline: PipelineFolder, log: Log) -> bool:
    """Whether the base stores this component quantized. It is loaded here then: transformers takes
    codes whose scales it does not know for weights, and says nothing.

    Raises FormatError for one that looks quantized and that no format explains.
    """
    found = base_component(pipeline, name, required=False)
    if not found.files:
        return False
    try:
        format_name, evidence = planner.identify(found, headers.read(found.files))
    except FormatError as error:
        raise FormatError(
            f"the pipeline's own {name} cannot be read: {error.what}",
            hint=f"{flag_for(name, 'path')} DIR gives it other weights",
        ) from error
    if format_name == PLAIN_FORMAT:
        return False
    log.fire("5b", component=name, evidence=evidence)
    return True
