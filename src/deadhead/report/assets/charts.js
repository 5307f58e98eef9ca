'use strict';
// What each chart shows: functions from a run's facts to panels for drawChart, and the same as a table.

const COLOURS = { kept: 'var(--kept)', cut: 'var(--cut)', control: 'var(--other)', extra: 'var(--extra)', beside: 'var(--beside)' };
const STAGES = { dense: 'dense', gated: 'gated', cut: 'cut', finetuned: 'fine-tuned', control: 'dense control' };
const SYMBOL_OF = { dense: 'square', gated: 'ring', cut: 'cross', finetuned: 'circle', control: 'diamond' };
const stageColour = (stage, usual = COLOURS.kept) => ({ control: COLOURS.control, cut: COLOURS.cut })[stage] || usual;
const share = (value) => percent.format(value);

/** Loss, validation perplexity, L0, λ and sparsity over all phases, one below the other on one axis of steps. */
function trainingChart(facts) {
  const curves = (name, title, look = {}) => facts.phases.filter((phase) => phase.scalars[name] && (!look.when || look.when(phase))).map((phase) => {
    const [steps, values] = phase.scalars[name];
    const isControl = phase.name.startsWith('control');
    return { line: true, x: steps.map((step) => step + phase.begin), y: values, symbol: steps.length === 1 || look.symbol ? 'circle' : '', size: 0.6,
      colour: isControl ? COLOURS.control : look.colour || COLOURS.kept, dash: isControl ? 'dashed' : look.dash,
      legend: isControl ? 'dense control' : look.legend,
      say: (place) => `${phase.title}, step ${number.format(steps[place])}\n${isControl ? 'dense control: ' : ''}${title} ${(look.format || digits)(values[place])}` };
  });
  const stages = Object.keys(STAGES).filter((stage) => facts.summary[stage] && facts.summary[stage].perplexity !== null);
  const whole = stages.map((stage) => facts.summary[stage]);
  const perplexities = curves('eval_perplexity', 'perplexity', { symbol: true });
  if (stages.length) {
    perplexities.push({ x: whole.map((found) => found.steps), y: whole.map((found) => found.perplexity), colour: COLOURS.kept,
      symbols: stages.map((stage) => SYMBOL_OF[stage]), colours: stages.map((stage) => stageColour(stage)),
      say: (place) => `${STAGES[stages[place]]} model, step ${number.format(whole[place].steps)}\nvalidation perplexity ${digits(whole[place].perplexity)}` });
  }
  const closed = { colour: COLOURS.cut, format: share };
  const panels = [
    { title: 'loss, nats per token', series: curves('loss', 'loss') },
    { title: 'validation perplexity', series: perplexities, y: { log: isWide(perplexities) },
      labels: stages.map((stage, place) => ({ x: whole[place].steps, y: whole[place].perplexity, text: STAGES[stage], above: stage === 'cut' || stage === 'finetuned' })) },
    { title: 'L0, expected number of open gates', series: curves('l0', 'L0', { colour: COLOURS.extra }) },
    { title: 'λ, nats per token for each open head', series: curves('lambda', 'λ', { colour: COLOURS.extra, when: (phase) => phase.scalars.lambda[1].some((value) => value) }) },
    { title: facts.phases.some((phase) => phase.scalars.budget) ? 'share of gates closed, share of the budget’s cost left' : 'share of gates closed',
      y: { zero: true, format: share }, series: [
      ...curves('sparsity', 'heads closed', { ...closed, legend: 'heads closed' }),
      ...curves('block_sparsity', 'blocks closed', { ...closed, dash: 'dotted', legend: 'blocks closed' }),
      ...curves('budget', 'budget’s cost left', { colour: COLOURS.extra, dash: 'dashdot', format: share, legend: 'budget’s cost left' })] },
  ].filter((panel) => panel.series.length);
  const begins = facts.phases.filter((phase) => !phase.name.startsWith('control') && phase.steps);
  for (const [place, panel] of panels.entries()) {
    const phases = begins.map((phase, line) => ({ x: phase.begin, text: phase.title, line: line % 2 }));  // short phases are narrower than their names
    Object.assign(panel, { x: { name: 'step of the whole run' }, y: panel.y || {}, rules: begins.map((phase) => phase.begin),
      labels: [...(panel.labels || []), ...(place ? [] : phases)] });
  }
  const table = facts.phases.flatMap((phase) => (phase.scalars.loss ? phase.scalars.loss[0] : []).map((step, place) => [
    `${phase.title}, step ${step}`, phase.scalars.loss[1][place],
    ...['l0', 'lambda', 'sparsity'].map((name) => valueAt(phase.scalars[name], step))]));
  return { panels, panelHeight: 92, sharedX: true, margin: { top: 54 }, note: 'Nothing has been logged yet.',
    say: 'Loss, validation perplexity, L0, lambda and sparsity over the steps of the run',
    table: ['Training', ['step', 'loss', 'L0', 'λ', 'sparsity'], table] };
}

/** Whether curves fall so far that only logarithms show their end. */
function isWide(series) {
  const values = series.flatMap((one) => one.y).filter((value) => value > 0);
  return Math.max(...values) > 8 * Math.min(...values);
}

function valueAt(curve, step) {
  const place = curve ? curve[0].indexOf(step) : -1;
  return place < 0 ? null : curve[1][place];
}

/** Ticks of columns that stand for steps. */
function stepTicks(steps) {
  const places = steps.length > 1 ? roundValues(steps[0], steps[steps.length - 1], 6).map((step) => nearest(steps, step)) : [0];
  return [...new Set(places)].map((place) => [place + 0.5, number.format(steps[place])]);
}

/** The open probability of every gate: a row for each, a column for each step. */
function gatesChart(facts, open) {
  const { steps } = facts.gates;
  const shown = facts.gates.layers.filter((layer) => open.has(layer.key));
  const rows = shown.flatMap((layer) => Array.from({ length: layer.total }, (_, index) => ({ layer, index, values: open.get(layer.key) })));
  const at = (row, frame) => rows[row].values[frame * rows[row].layer.total + rows[row].index];
  const name = (row) => `layer ${rows[row].layer.layer}, ${rows[row].layer.what} ${rows[row].index}`;
  const ticks = shown.map((layer) => [rows.findIndex((row) => row.layer === layer) + 0.5, `${layer.what === 'block' ? 'blocks ' : ''}${layer.layer}`]);
  const panels = rows.length ? [{ title: 'layer, a row for each gate', x: { range: [0, steps.length], ticks: stepTicks(steps), name: 'step of the phase with gates' },
    y: { range: [rows.length, 0], ticks }, cells: { rows: rows.length, columns: steps.length, at,
      say: (row, frame) => `${name(row)}\nstep ${number.format(steps[frame])}: open in ${share(at(row, frame) / 255)} of the draws` } }] : [];
  return { panels, panelHeight: Math.min(520, Math.max(110, 9 * rows.length)), note: 'No gate has been logged yet.',
    say: 'Open probability of every gate over the steps of the phase with gates',
    table: ['Open probability at the first and the last step', ['gate', ...(steps.length ? [`step ${steps[0]}`, `step ${steps[steps.length - 1]}`] : [])],
      rows.map((_, row) => [name(row), ...[0, steps.length - 1].map((frame) => at(row, frame) / 255)])] };
}

/** The courses of the gates of one layer. */
function layerChart(facts, open, chosen) {
  const layer = facts.gates.layers.find((one) => one.key === chosen.key);
  const values = layer && open.get(layer.key);
  if (!values) return { panels: [], note: 'No gate has been logged yet.', say: 'No gate has been logged yet', table: ['Gates', ['head'], []] };
  const { steps } = facts.gates;
  const kept = layer.kept && new Set(layer.kept);
  const series = Array.from({ length: layer.total }, (_, index) => {
    const stays = kept ? kept.has(index) : values[(steps.length - 1) * layer.total + index] >= 128;
    const y = steps.map((_, frame) => values[frame * layer.total + index] / 255);
    return { line: true, x: steps, y, colour: stays ? COLOURS.kept : COLOURS.cut, dash: stays ? '' : 'dashed', width: index === chosen.index ? 4 : 1.4,
      legend: stays ? 'stays' : 'cut', symbol: steps.length === 1 ? 'circle' : '',
      say: (frame) => `${layer.what} ${index}, step ${number.format(steps[frame])}\nopen in ${share(y[frame])} of the draws` };
  });
  return { panels: [{ title: 'open probability', series, x: { name: 'step of the phase with gates' }, y: { range: [-0.03, 1.03], format: share } }], panelHeight: 170,
    say: `Open probability of each ${layer.what} of layer ${layer.layer}`,
    caption: `Layer ${layer.layer}: solid stays, dashed is cut, thick is the one chosen.`,
    table: [`Layer ${layer.layer}`, ['step', ...series.map((_, index) => `${layer.what} ${index}`)], steps.map((step, frame) => [step, ...series.map((one) => one.y[frame])])] };
}

/** What share of the dense model is left of each cost. */
function costsChart(facts) {
  const { dense, finetuned } = facts.summary;
  const rows = [];
  const add = (name, before, after, unit, show = digits) => {
    if (before && after !== undefined && after !== null) rows.push({ name, share: after / before, before: show(before) + unit, after: show(after) + unit });
  };
  const sum = (values) => values ? values.reduce((total, value) => total + value, 0) : undefined;
  const { dense: denseCost, finetuned: cutCost } = facts.costs;
  if (dense && finetuned) {
    add('heads', sum(dense.heads), sum(finetuned.heads), '');
    if (sum(dense.hidden_units)) add('hidden units', sum(dense.hidden_units), sum(finetuned.hidden_units), '');
    add('parameters', dense.parameters, finetuned.parameters, '');
    add('FLOPs a token', dense.flops_per_token, finetuned.flops_per_token, '');
  }
  if (denseCost && cutCost) add('key/value cache', denseCost.kv_cache_bytes, cutCost.kv_cache_bytes, ' bytes');
  if (facts.finished) add('time a token', 1e6 / dense.tokens_per_second, 1e6 / finetuned.tokens_per_second, ' µs');
  const widest = Math.max(1, ...rows.map((row) => row.share));
  const panels = rows.length ? [{ x: { range: [0, widest * 1.02], format: share, name: 'share of the dense model' }, rules: [1],
    y: { range: [rows.length, 0], ticks: rows.map((row, place) => [place + 0.5, row.name]) },
    bars: rows.map((row) => ({ value: row.share, text: share(row.share), say: `${row.name}: ${row.before} → ${row.after}` })) }] : [];
  return { panels, panelHeight: 38 * rows.length, margin: { left: 112, top: 10 }, note: 'The pruned model has not been measured yet.', say: 'Share of the dense model that is left',
    table: ['Dense against cut', ['', 'dense', 'pruned', 'left'], rows.map((row) => [row.name, row.before, row.after, share(row.share)])] };
}

/** Perplexity against size, of this run's models and those of the runs beside it. */
function sizeChart(facts, others, size) {
  const points = [...facts.points, ...others];
  const unit = size === 'parameters' ? 'parameters' : 'FLOPs a token';
  const series = [];
  for (const isThis of [false, true]) {
    for (const stage of ['dense', 'cut', 'finetuned', 'control']) {
      const found = points.filter((point) => point.this === isThis && point.stage === stage && point.perplexity !== null);
      if (!found.length) continue;
      series.push({ x: found.map((point) => point[size]), y: found.map((point) => point.perplexity), symbol: SYMBOL_OF[stage], size: isThis ? 1.4 : 1,
        colour: stageColour(stage, isThis ? COLOURS.kept : COLOURS.beside), legend: isThis ? STAGES[stage] : `${STAGES[stage]}, other runs`,
        say: (place) => `${found[place].run}, ${STAGES[stage]}, ${number.format(found[place].steps)} steps\n${number.format(found[place][size])} ${unit}, perplexity ${digits(found[place].perplexity)}` });
    }
  }
  const panels = series.length ? [{ title: 'validation perplexity', series, x: { zero: true, name: unit }, y: {} }] : [];
  return { panels, panelHeight: 240, note: 'No model has been measured yet.', say: 'Perplexity against size of this run and others',
    table: ['Perplexity against size', ['model', 'parameters', 'FLOPs a token', 'steps', 'perplexity'],
      points.map((point) => [`${point.run}, ${STAGES[point.stage]}`, point.parameters, point.flops_per_token, point.steps, point.perplexity])] };
}

/** The output difference of each head, layer by layer. */
function differenceChart(facts, chosen) {
  const layers = facts.gates.layers.filter((layer) => layer.what === 'head' && layer.difference.length);
  const heads = layers.flatMap((layer, row) => layer.difference.map((value, index) => ({ x: row + 0.7 * ((index + 0.5) / layer.total - 0.5), value,
    name: `layer ${layer.layer}, head ${index}`, stays: !layer.kept || layer.kept.includes(index), isChosen: chosen.key === layer.key && chosen.index === index })));
  const series = [true, false].map((stays) => [stays, heads.filter((head) => head.stays === stays)]).filter(([, found]) => found.length).map(([stays, found]) => ({
    x: found.map((head) => head.x), y: found.map((head) => head.value), sizes: found.map((head) => head.isChosen ? 1.8 : 1),
    symbol: stays ? 'circle' : 'cross', colour: stays ? COLOURS.kept : COLOURS.cut, legend: stays ? 'stays' : 'cut',
    say: (place) => `${found[place].name} ${stays ? 'stays' : 'is cut'}\noutput difference ${digits(found[place].value, 3)}` }));
  const panels = series.length ? [{ title: 'output difference', series, y: { zero: true },
    x: { range: [-0.5, layers.length - 0.5], ticks: layers.map((layer, row) => [row, layer.layer]), name: 'layer' } }] : [];
  return { panels, panelHeight: 240, note: 'No output difference has been logged yet.', say: 'Output difference of each head',
    table: ['Output difference', ['head', 'output difference', ''], heads.map((head) => [head.name, head.value, head.stays ? 'stays' : 'cut'])] };
}

/** The attention pattern of the chosen head, or of every query head of the chosen group. */
function attentionChart(facts, patterns, chosen) {
  const layer = facts.gates.layers.find((one) => one.key === chosen.key);
  const found = patterns && layer && layer.what === 'head' ? patterns.layers[layer.layer] : null;
  const queries = found ? queryHeads(found.total, facts, layer, chosen.index) : [];
  const shown = queries.filter((head) => found.heads.includes(head)).slice(0, 8);
  if (!shown.length) {
    const text = !patterns ? 'No attention has been read yet' : layer && layer.what === 'block' ? 'Blocks have no attention of their own' : 'This head was cut: it looks nowhere any more';
    return { panels: [], note: `${text}.`, say: text, table: [text, ['token'], []] };
  }
  const { tokens, columns } = patterns;
  const below = 7 * Math.min(18, Math.max(...columns.map((token) => token.length))) + 22;  // room for the names of columns
  const weights = found.unpacked ||= bytes(found.weights);
  const panels = shown.map((head) => {
    const begin = found.heads.indexOf(head) * tokens.length * columns.length;
    const at = (row, column) => weights[begin + row * columns.length + column];
    const ticks = (names) => names.map((token, place) => [place + 0.5, token]);
    return { title: `layer ${layer.layer}, head ${head}`, x: { range: [0, columns.length], ticks: ticks(columns), turned: below, name: 'rows: the token that reads; columns: the token that is read' },
      y: { range: [tokens.length, 0], ticks: ticks(tokens) }, cells: { rows: tokens.length, columns: columns.length, at,
        say: (row, column) => `${tokens[row]} reads ${columns[column]}\n${share(at(row, column) / 255)}` } };
  });
  return { panels, panelHeight: Math.max(180, 13 * tokens.length), margin: { left: 78, bottom: below + 8 }, perRow: (width) => Math.floor(width / 190),
    say: `Attention pattern of layer ${layer.layer}, head ${shown.join(', ')}`,
    table: [`Layer ${layer.layer}, head ${shown[0]}`, ['reads', ...columns],
      tokens.map((token, row) => [token, ...columns.map((_, column) => panels[0].cells.at(row, column) / 255)])] };
}

/** Which query heads a unit has: itself, or all those that share its keys and values. */
function queryHeads(total, facts, layer, index) {
  if (facts.unit !== 'kv_group') return [index];
  const each = Math.max(1, Math.round(total / layer.total));
  return Array.from({ length: each }, (_, place) => index * each + place);
}
