"""`trol map`: how much second visits weigh, token by token, as a PNG and as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from trol.cli import terminal
from trol.cli.terminal import option, run_record

if TYPE_CHECKING:
    from trol.cli.conversation import Conversation
    from trol.reports.maps import DepthMap

EXAMPLES = (
    'trol map --image docs/board.png --question "what is right of the yellow 5?"',
    'trol map --image docs/board.png --question "is there a 7?" --out runs/seven',
    'trol map --image docs/board.png --question "is there a 7?" --depth all:2 --json',
)


def map_question(
    model: terminal.Model = terminal.DEFAULT_MODEL,
    *,
    image: Annotated[str, option("--image", "PATH", "The picture.")],
    question: Annotated[str, option("--question", "TEXT", "The question.")],
    out: terminal.Out = Path("runs/map"),
    depth: terminal.Depth = None,
    max_new_tokens: terminal.MaxNewTokens = 16,
    as_json: terminal.AsJson = False,
) -> None:
    """Draw how much second visits weigh, layer by layer."""
    from trol.cli.conversation import open_conversation
    from trol.data.images import open_image
    from trol.files import folder, write_json, write_whole
    from trol.reports.maps import draw
    from trol.reports.pages import warning_if_it_fails

    picture = open_image(image)
    conversation = open_conversation(model, max_new_tokens=max_new_tokens, plan=depth)
    conversation.show(picture)
    with terminal.quiet_libraries():
        depth_map, values = trace_question(conversation, question)
        file = folder(out) / "map.png"
        result = {"model": model, "image": image, **values, "file": str(file), "run": run_record()}
        with warning_if_it_fails(write_json(file.with_name("map.json"), result)):
            write_whole(file, draw(depth_map))
    terminal.report(result, as_json=as_json, text=lambda: f"{values['answer']}\n{file}")


def trace_question(conversation: Conversation, question: str) -> tuple[DepthMap, dict[str, Any]]:
    """Ask `question` about the one picture shown; its map, and the same as plain values."""
    import trol
    from trol.reports.maps import as_values, map_of

    picture = conversation.pictures[-1]
    with trol.trace(conversation.model) as trace:
        answer = conversation.ask(question)
    depth_map = map_of(
        trace.visits[:, 0],
        trace.weights[:, :, 0],
        answer.input_ids,
        picture=picture,
        image_token=conversation.model.config.image_token_id,
        tokenizer=conversation.tokenizer,
        title=f"“{question}”  →  {answer.text}",
    )
    values = {"question": question, "answer": answer.text, "depth": conversation.plan}
    return depth_map, {**values, **as_values(depth_map), "cost": trace.cost.json()}
