"""What the processes of the round trips run. They share nothing with the tests but a folder and the Hub's address."""

# Answers of a model to the batch that another process left; the names are those of tests/hub/examples.py.
CHECK = """
import json, sys, torch, transformers
from pathlib import Path
from safetensors.torch import load_file

def batch(name):
    tensors = load_file(f"{name}.safetensors")
    return tensors, tensors.pop("answer")

def difference(name, model):
    inputs, expected = batch(name)
    inputs.pop("labels", None)
    with torch.no_grad():
        return (model.eval()(**inputs)[0] - expected).abs().max().item()
"""

# With the package: stock push_to_hub of every system, then a second version behind a tag.
PUSH = (
    CHECK
    + """
from huggingface_hub import HfApi
from tests.hub.examples import NAMES, example, repository, write_expected

for name in NAMES:
    model, processor = example(name)
    write_expected(name, model, Path("."))
    model.push_to_hub(repository(name))
    processor.push_to_hub(repository(name))
    HfApi().create_tag(repository(name), tag="v1")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.push_to_hub(repository(name))
"""
)

PULL = (
    CHECK
    + """
import hf_tfamily
from transformers.models.auto import image_processing_auto, tokenization_auto

results = {}
for name, (repo, head, processor_class) in json.loads(sys.argv[1]).items():
    auto_class = getattr(transformers, head)
    tagged, newest = (auto_class.from_pretrained(repo, revision=revision) for revision in ("v1", "main"))
    auto = tokenization_auto if processor_class == "AutoTokenizer" else image_processing_auto
    processor = getattr(auto, processor_class).from_pretrained(repo)
    results[name] = {
        "tagged": difference(name, tagged),
        "newest": difference(name, newest),
        "class": type(tagged).__module__,
        "processor": type(processor).__name__,
    }
print(json.dumps(results))
"""
)

# Without the package: the repository's own code.
REMOTE = (
    CHECK
    + """
import importlib.util, logging

for package in ("hf_tfamily", "triton"):
    assert importlib.util.find_spec(package) is None, package

said = []
logging.getLogger().addHandler(listener := logging.Handler(logging.WARNING))
listener.emit = lambda record: said.append([record.name, record.getMessage()])

def run(name, repo, head):
    auto_class = getattr(transformers, head)
    model = auto_class.from_pretrained(repo, trust_remote_code=True)
    result = {"loaded": difference(name, model), "class": type(model).__module__}
    result["default"] = model.config._attn_implementation
    try:
        model.set_attn_implementation("block_sparse")
    except ImportError as error:
        result["refused"] = str(error)
    if model.can_generate():
        inputs, _ = batch(name)
        ids = model.generate(inputs["input_ids"][:, :5], max_new_tokens=4, do_sample=False)
        result["generated"] = ids.shape[1]
    inputs, _ = batch(name)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = model(**inputs).loss
    loss.backward()
    optimizer.step()
    result["loss"] = loss.item()
    names = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    result["labels move"] = type(model).__name__ in names.values()  # under the Trainer's label smoothing
    result["changed"] = sum(not torch.equal(a, b) for a, b in zip(before, model.parameters()))
    model.save_pretrained(f"saved-{name}")
    with torch.no_grad():
        inputs.pop("labels", None)
        answer = model.eval()(**inputs)[0]
        again = auto_class.from_pretrained(f"saved-{name}", trust_remote_code=True).eval()
        result["saved again"] = (again(**inputs)[0] - answer).abs().max().item()
    result["files"] = sorted(path.name for path in Path(f"saved-{name}").iterdir())
    return result

results, wanted = {}, json.loads(sys.argv[1])
for name, (repo, head) in wanted.items():
    try:
        results[name] = run(name, repo, head)
    except Exception as error:
        results[name] = {"error": f"{type(error).__name__}: {error}"}
print(json.dumps({**results, "said": said}))
"""
)

# Remote code first, the package afterwards, in one process.
BOTH = (
    CHECK
    + """
results, wanted = {}, json.loads(sys.argv[1])
for name, (repo, head) in wanted.items():
    model = getattr(transformers, head).from_pretrained(repo, trust_remote_code=True)
    results[name] = {"remote": type(model).__module__, "before": difference(name, model)}
import hf_tfamily
for name, (repo, head) in wanted.items():
    model = getattr(transformers, head).from_pretrained(repo, trust_remote_code=True)
    results[name] |= {"ours": type(model).__module__, "after": difference(name, model)}
print(json.dumps(results))
"""
)

# Errors of pulling, by what each was about.
REFUSED = """
import json, sys, hf_tfamily
from transformers import AutoModelForCausalLM

results = {}
for case, arguments in json.loads(sys.argv[1]).items():
    try:
        AutoModelForCausalLM.from_pretrained(**arguments)
        results[case] = "loaded"
    except Exception as error:
        results[case] = f"{type(error).__name__}: {error}"
print(json.dumps(results))
"""
