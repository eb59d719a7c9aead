const count = bits => { let n = 0; for (; bits; bits &= bits - 1) n++; return n }
const names = (data, bits) => data.classes.filter((_, c) => bits >> c & 1).join(", ")
const share = (part, whole) => (100 * part / whole).toFixed(1) + " %"
const grouped = number => String(number).replace(/\B(?=(\d{3})+$)/g, ",")

// for each layer and unit: how many of the chosen classes keep it
const keepers = (data, bits) => data.layers.map(layer => layer.units.map(unit => count(unit & bits)))

const summary = (layer, number, kept) => {
  const one = kept.filter(n => n == 1).length, several = kept.filter(n => n > 1).length
  return `layer ${number} (${layer.name}): ${one + several} of ${kept.length} units kept, ` +
    `${one} of them by one class, ${several} by several`
}

// what there is to say and to measure; fields without a number are left out of the page
const answer = (data, bits) => {
  const chosen = count(bits), row = data.rows[bits]
  if (chosen == 0) return {text: "Pick two classes or more: a network has to choose between them."}
  if (chosen == 1) return {text: `These are the units of the module of ${names(data, bits)}. With one class there is ` +
    "nothing to choose between: pick another one."}
  if (!row) return {text: `The sub-task ${names(data, bits)} was not evaluated.`}
  const [weights, flops, right, rightWhole, images] = row, [allWeights, allFlops] = data.whole
  return {
    text: `A network for ${names(data, bits)} keeps ${share(weights, allWeights)} of the weights and is right for ` +
      `${share(right, images)} of ${images} test images; the whole network, asked to choose among the same classes, ` +
      `for ${share(rightWhole, images)}.`,
    meters: [
      ["weights", weights / allWeights, `${grouped(weights)} of ${grouped(allWeights)}, ${share(weights, allWeights)}`],
      ["multiply-adds", flops / allFlops, `${grouped(flops)} of ${grouped(allFlops)}, ${share(flops, allFlops)}`],
      ["right, composed", right / images, `${right} of ${images}, ${share(right, images)}`],
      ["right, whole", rightWhole / images, `${rightWhole} of ${images}, ${share(rightWhole, images)}`]],
  }
}
